"""The packages behind the commands of hack/."""
