"""Units over the workers of Dask distributed, for runs that one machine is too slow for.

`parcels`   what travels: a study or a live problem without its weights, and the settings
`worker`    what a worker does with it: load a checkpoint by path and digest, compute one unit, give it back
`jobs`      what goes out at once: a unit, the gradient that the shards of a checkpoint share, a curvature
`driver`    what goes out when, what becomes of jobs that fail or kill, results in hand
`clients`   Dask itself: connecting, a cluster of this machine, versions, what is lost

The driver is the only writer of the store. Nothing here is imported where no client is given, and Dask only in
`clients`, `driver`, `jobs` and `parcels`.
"""
