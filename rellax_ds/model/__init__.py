"""The LLM and what is trained on it: backbone, CFLoRA with its interaction matrix, SPA, and the
whole as one module.
"""
