"""The product on such a cluster, from images to an adapter."""
