// Package backup keeps what volumes were at moments in a directory or an object store, apart from the cluster they come from.
//
// A backup is whole: it says for every page of a volume where its bytes are. It moves only what is new since the backup before it: a page
// that lies where it lay then, in the same block of the cluster, has not changed, since a block is used for one content only (D2), and does not even
// have to be read; a page that lies elsewhere is read, and moved only if its hash is another one.
//
// A repository has four kinds of objects, which are written once and never changed (docs/format/backup.md):
//
//	packs/ID           pages, compressed some at a time: frames
//	maps/HASH          where the pages of 256 MiB of a volume are: a section
//	backups/VOL/ID     a backup: what it is of, and its sections
//	torus-backups      what this is
//
// and locks/…, which keep a prune apart from whoever adds. A backup exists once backups/VOL/ID does, which is written last. Whatever is read
// is checked against a hash first: sections by their names, pages by what their section says, a backup by a line of its own.
package backup
