"""The decoder, its loss and its decode loop; never opens a file, prints, or reads a clock."""
