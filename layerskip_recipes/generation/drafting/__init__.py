"""Drafts of self-speculation. planner.py makes a `Speculation` (speculation.py) of the section (section.py).
draft_weights.py builds what drafts. In a round, drafters.py picks a drafter (drafter.py has their interface; chain.py
drafts from an exit, lookup.py from the text, and rule.py decides), and verification.py checks its draft.
"""
