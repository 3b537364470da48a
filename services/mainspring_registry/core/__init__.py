"""What is right in the catalog, decided on paper: documents, specifications, tools, pages and frames."""
