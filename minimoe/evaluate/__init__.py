"""What can the model do? Scores with chance level and interval (chapter 11)."""
