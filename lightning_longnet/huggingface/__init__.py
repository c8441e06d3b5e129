"""What an exported folder holds for transformers: `exported.py` copies both files into it as they are."""
