"""swavkit beside the published algorithm: verified, then timed. See ``README.md`` here."""
