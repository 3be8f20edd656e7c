"""Pictures from text and text from pictures."""
