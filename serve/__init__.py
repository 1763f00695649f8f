"""The service: the retriever and the generator behind HTTP on Ray Serve.  Importing it costs
nothing.
"""
