"""What the Hub starts."""

from .service import AgentsHub

AgentsHub.launch_instance()
