"""What several commands share: serving, output, pictures."""
