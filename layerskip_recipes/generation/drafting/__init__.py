"""Drafts of self-speculation: the interface of a drafter, and one file for each kind and for the choice between them.

drafter.py has the interface, speculation.py a user's settings; chain.py drafts from an exit, lookup.py from the
text, and choice.py chooses between them by measured rates.
"""
