"""The HTTP interface: routes, schemas, middleware, errors, streams.

In: a rollout of models (`models/`), `ApiSettings`. Out: a FastAPI application. May know: fastapi, prometheus_client,
the generation and tokenization rooms; not Ray Serve.
"""
