"""What is on the disk: files that are whole or not there, JSON with a schema, text as users have it."""
