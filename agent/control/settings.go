package control

// Settings is the owner's policy and the configuration, key by key, as they are
// in force. It is for administrators: a configuration may name a proxy with its password.
type Settings struct {
	Header
	Policy        []Setting `json:"policy"`
	Configuration []Setting `json:"configuration"` // as of the start of the daemon
	// Problem is why the policy as it stands now is not in force; then Policy
	// is the last one that was good. "" if it is in force.
	Problem string `json:"problem"`
}

// Setting is one key.
type Setting struct {
	Key    string `json:"key"`    // "mode", "repository.url"
	Value  string `json:"value"`  // as it would stand in the file; in words where it is not set
	Source string `json:"source"` // "default", FILE:LINE, or device management's place
}
