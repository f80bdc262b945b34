"""Drafts of self-speculation: drafter.py has the interface, speculation.py a user's settings. chain.py drafts from an
exit, lookup.py from the text, and choice.py chooses between them by measured rates.
"""
