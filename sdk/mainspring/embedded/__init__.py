"""PostgreSQL and Valkey servers that come in wheels: how to run one in the foreground. Supervises nothing."""
