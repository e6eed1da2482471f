"""Studies: arms that are tuned alike, tested on seeds nothing was chosen by, and compared in pairs."""
