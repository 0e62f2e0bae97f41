"""What a report says and shows of rows that were measured: words, tables, pictures, and the page they stand on."""
