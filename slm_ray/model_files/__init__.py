"""A model's folder in Hugging Face's layout, whoever wrote it: what is believed of its files, and how they are read."""
