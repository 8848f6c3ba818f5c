// Nothing is built in this module: it pins the version and the content of the conformance tests, of which test/cluster/conformance builds a
// copy with the requirements that they come with.
module github.com/margay-cni/margay/test/cluster/tools/network-policy-api

go 1.26.6

require sigs.k8s.io/network-policy-api v0.3.0
