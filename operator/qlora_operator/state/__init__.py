"""Keep what was observed: small frozen values cut out of API objects, and a cache of them."""
