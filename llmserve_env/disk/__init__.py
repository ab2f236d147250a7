"""Files that outlive the process that writes them, and locks that do not."""
