"""What a run learns by beside its stories and its optimizer: teachers, and the path of its weights."""
