"""Talk to the API server: client, credentials, and kopf without the official client."""
