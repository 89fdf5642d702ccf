"""Experiments beside other people's packages: faiss and RaBitQ."""
