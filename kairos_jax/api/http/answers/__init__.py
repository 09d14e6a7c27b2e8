"""What a client gets: the streams of one HTTP request, run and written as OpenAI's API has it.

May import: what `api.http` may, of `api.http` the body, the errors and the connections. Begin with
`run.py`.
"""
