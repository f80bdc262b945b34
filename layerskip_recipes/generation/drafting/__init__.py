"""Drafts of self-speculation: decoding.py runs a round. drafter.py has the interface of drafters, chain.py drafts from
an exit, lookup.py from the text, and rule.py decides between them. speculation.py has a user's settings.
"""
