"""The pages that people look at, made on the server: no build step, no third-party host, no script needed."""
