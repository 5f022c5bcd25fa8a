"""Draw the documents' pictures from real runs."""
