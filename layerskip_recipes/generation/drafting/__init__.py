"""Drafts of self-speculation. auto_drafts.py makes a `Speculation` (speculation.py) of the section (section.py).
draft_model.py builds what drafts, and decoding.py runs a round: drafter.py has the interface of drafters, chain.py
drafts from an exit, lookup.py from the text, and rule.py decides between them.
"""
