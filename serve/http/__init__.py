"""HTTP: the guard, the routes, and the forms of requests and responses; knows nothing of Ray."""
