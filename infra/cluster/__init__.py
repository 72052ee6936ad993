"""A cluster of several Ray nodes on one machine, with what stands beside it: `infra/local_cluster.sh`."""
