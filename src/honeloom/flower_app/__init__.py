"""The app that `federate` runs on Flower: `server_app` beside the SuperLink, `client_app` on every SuperNode."""
