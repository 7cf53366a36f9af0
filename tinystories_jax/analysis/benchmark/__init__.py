"""What this machine makes of the code that training, writing and preparing run: `run.py` is where it begins."""
