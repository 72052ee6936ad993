"""The HTTP interface: routes, schemas, middleware, errors, streams.

In: a loaded model, `ApiSettings`. Out: a FastAPI application. May know: fastapi, the generation room; not Ray Serve.
"""
