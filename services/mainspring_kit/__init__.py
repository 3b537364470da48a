"""What two services need and that names no domain noun: errors, identity, servers, channels, streams, stores."""
