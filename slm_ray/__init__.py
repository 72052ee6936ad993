"""SLM-Ray: a folder of stories in, a small language model behind an HTTP endpoint out.

Rooms, bottom up: what all use (`errors`, `storage`, `periodic`, `hub_reference`, `corpus`, `config`,
`cli`); `model`, `dataset` and
`tokenization`; `sources`, `generation` and `runs`; `preparation` and `tracking`; `training`; `distributed`; the command
lines. A room imports only rooms below it.
"""
