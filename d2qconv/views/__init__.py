"""What commands plan and find, in words: lines and rows for people, objects for scripts. Nothing here prints."""
