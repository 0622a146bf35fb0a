"""The consultation room: a terminal app that answers offline from reviewed passages."""
