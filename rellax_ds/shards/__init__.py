"""Shards: prompts on disk, and the way from there to a `Batch`.

Written once by `write`, verified and read by position by `read`, put in order by `order`, padded by
`collate`. A sample's place in the training stream is a function of (seed, epoch, step) alone.
"""
