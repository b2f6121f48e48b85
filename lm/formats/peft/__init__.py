"""PEFT adapter directories, both ways."""
