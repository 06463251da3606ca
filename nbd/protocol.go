package nbd

// The numbers of the NBD protocol, from its public specification (NetworkBlockDevice/nbd, doc/proto.md). All
// integers on the wire are big endian.

const (
	magicInit       = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454F5054 // "IHAVEOPT"
	magicOptReply   = 0x3e889045565a9
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef
)

// Sizes in bytes of what has a fixed size.
const (
	greetingSize      = 18  // magics and handshake flags
	optionHeaderSize  = 16  // magic, option, length
	optReplySize      = 20  // magic, option, reply type, length
	requestSize       = 28  // magic, flags, command, cookie, offset, length
	simpleSize        = 16  // magic, error, cookie
	chunkSize         = 20  // magic, flags, type, cookie, length
	exportNamePadding = 124 // zeroes behind the reply to EXPORT_NAME, unless NO_ZEROES was negotiated
)

// What a client may send at most.
const (
	maxString  = 4096     // bytes of a name or a query
	maxOption  = 64 << 10 // bytes of an option that is looked at; longer ones are discarded and refused
	maxDiscard = 32 << 20 // bytes of an option that is discarded; longer ones end the session
	maxPayload = 32 << 20 // bytes of one READ or WRITE, as advertised
	maxMessage = 1024     // bytes of an error's text
	maxExtents = 64 << 10 // extents in one reply to BLOCK_STATUS
)

// The block sizes that are advertised, in bytes.
const (
	minBlock       = 1
	preferredBlock = 4096
)

// Handshake flags (server) and client flags; the same bits mean the same.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Transmission flags.
const (
	flagHasFlags        = 1 << 0
	flagReadOnly        = 1 << 1
	flagSendFlush       = 1 << 2
	flagSendFUA         = 1 << 3
	flagSendTrim        = 1 << 5
	flagSendWriteZeroes = 1 << 6
	flagSendDF          = 1 << 7
	flagCanMultiConn    = 1 << 8
	flagSendCache       = 1 << 10
	flagSendFastZero    = 1 << 11
)

// Options.
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMetaContext = 9
	optSetMetaContext  = 10
	optExtendedHeaders = 11
)

// Replies to options.
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repErrUnsup    = 1<<31 | 1
	repErrPolicy   = 1<<31 | 2
	repErrInvalid  = 1<<31 | 3
	repErrUnknown  = 1<<31 | 6
	repErrShutdown = 1<<31 | 7
	repErrTooBig   = 1<<31 | 9
)

// Information types.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// contextAllocation is the one metadata context there is; contextID is the number a client gets for it.
const (
	contextAllocation = "base:allocation"
	contextID         = 1
)

// Commands.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
	cmdCount       = 8
)

// Command flags.
const (
	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagDF       = 1 << 2
	cmdFlagReqOne   = 1 << 3
	cmdFlagFastZero = 1 << 4
)

// Structured replies.
const (
	chunkFlagDone = 1 << 0

	chunkNone        = 0
	chunkOffsetData  = 1
	chunkOffsetHole  = 2
	chunkBlockStatus = 5
	chunkError       = 1<<15 | 1
)

// States of an extent in base:allocation.
const (
	stateHole = 1 << 0
	stateZero = 1 << 1
)

// errno is an error of the transmission phase; 0 is success.
type errno uint32

const (
	ePERM     errno = 1
	eIO       errno = 5
	eINVAL    errno = 22
	eNOSPC    errno = 28
	eOVERFLOW errno = 75
	eNOTSUP   errno = 95
	eSHUTDOWN errno = 108
)
