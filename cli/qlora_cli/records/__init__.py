"""Forms of the files that commands show, whatever version or person wrote them."""
