"""The verbs pack, unpack and convert."""
