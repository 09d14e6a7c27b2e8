#!/bin/sh
# Makes the certificates of this directory, valid for a hundred years. Needs openssl.
set -eu
cd "$(dirname "$0")"
ca() {  # NAME
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 \
    -subj "/CN=kairos_jax test $1" -addext keyUsage=critical,keyCertSign \
    -keyout "$1.key" -out "$1.pem"
}
leaf() {  # NAME CA SAN
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=kairos_jax test $1" \
    -keyout "$1.key" -out "$1.csr"
  printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\n' "$3" > "$1.ext"
  openssl x509 -req -in "$1.csr" -CA "$2.pem" -CAkey "$2.key" -days 36500 \
    -extfile "$1.ext" -out "$1.pem"
  rm "$1.csr" "$1.ext"
}
ca ca
ca other_ca
leaf peer ca DNS:kairos,DNS:localhost,IP:127.0.0.1,IP:::1
leaf named ca DNS:kairos
leaf stranger other_ca DNS:kairos,DNS:localhost,IP:127.0.0.1,IP:::1
openssl ec -aes128 -passout pass:secret -in peer.key -out locked.key
rm -f ca.key other_ca.key ca.srl other_ca.srl
chmod 600 ./*.key
