"""The commands `fleet ...`: what the servers of a fleet share."""
