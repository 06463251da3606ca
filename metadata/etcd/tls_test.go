package etcd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/metadata/embed"
)

// authority issues certificates into files.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// issue returns the files of a certificate and its key. The first one is the authority's own.
func (a *authority) issue(name string) (cert, key string) {
	a.t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		KeyUsage:    x509.KeyUsageDigitalSignature,
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		tmpl.IsCA, tmpl.BasicConstraintsValid, tmpl.KeyUsage = true, true, x509.KeyUsageCertSign
		parent, signer = tmpl, k
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &k.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	if a.cert == nil {
		if a.cert, err = x509.ParseCertificate(der); err != nil {
			a.t.Fatal(err)
		}
		a.key = k
	}
	raw, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	write := func(suffix, kind string, b []byte) string {
		file := filepath.Join(a.dir, name+suffix)
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}), 0o600); err != nil {
			a.t.Fatal(err)
		}
		return file
	}
	return write(".pem", "CERTIFICATE", der), write("-key.pem", "PRIVATE KEY", raw)
}

func TestTLS(t *testing.T) {
	a := &authority{t: t, dir: t.TempDir()}
	ca, _ := a.issue("ca")
	serverCert, serverKey := a.issue("server")
	clientCert, clientKey := a.issue("client")
	s, err := embed.Start(t.Context(), embed.Config{
		DataDir: t.TempDir(), ClientURL: "https://127.0.0.1:0",
		CertFile: serverCert, KeyFile: serverKey, CAFile: ca,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	good := torus.Config{MetadataAddress: s.Endpoint(), CAFile: ca, CertFile: clientCert, KeyFile: clientKey, DialTimeout: 10 * time.Second}
	if err := Init(t.Context(), FromTorus(good), gmd, nil); err != nil {
		t.Fatal(err)
	}
	connect(t, FromTorus(good))
	for name, spoil := range map[string]func(*torus.Config){
		"no client certificate": func(c *torus.Config) { c.CertFile, c.KeyFile = "", "" },
		"no CA":                 func(c *torus.Config) { c.CAFile = "" },
	} {
		cfg := good
		cfg.DialTimeout = 500 * time.Millisecond
		spoil(&cfg)
		c, err := New(t.Context(), FromTorus(cfg))
		if err == nil {
			c.Close()
		}
		if !errors.Is(err, torus.ErrMetadataUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
		t.Log(err)
	}
}
