"""What a round drafts: chain, tree, look-up, and the choice between them."""
