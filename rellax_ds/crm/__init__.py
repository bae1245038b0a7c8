"""The conventional recommender: DIN and SIM, trained on ids, cached for the LLM.

Its item embeddings become SPA's soft tokens and its instance embedding h drives CFLoRA, so both
are written once here and the recommender never enters the LLM's loop.
"""
