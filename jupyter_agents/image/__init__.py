"""The workspace image: its Dockerfile, its supervisor `agentctl`, and how it is built."""
