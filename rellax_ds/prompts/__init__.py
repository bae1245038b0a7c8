"""Prompts: from a user's history and a candidate to token ids, slots and answer positions.

Nothing is searched for in rendered text: the builder knows where a soft token or an answer lies
because it put it there.
"""
